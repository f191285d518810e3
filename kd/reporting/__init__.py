"""What kd/report.py writes: runs found and grouped, statistics, tables, figures, the page."""
