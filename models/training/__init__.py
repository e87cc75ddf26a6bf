"""What every recipe in models/ needs; see README.md. It imports nothing of the workbench."""
