"""The foreign languages: each file drives one library, imported on first use."""
