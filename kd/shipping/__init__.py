"""What kd/export.py and kd/predict.py are made of: files in other formats, their runtimes, and what they cost."""
