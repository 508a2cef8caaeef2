"""What is looked at: a run, or two of them compared, as one HTML page or as Markdown; report.py is the verb."""
