"""What is told of a finished run: pages, figures and the terminal's table."""
