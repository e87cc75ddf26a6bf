"""Reading and writing the field's data set formats, and the archives they come in."""
