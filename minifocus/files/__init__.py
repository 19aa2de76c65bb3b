"""Files on the disk: opened (`reading`), written whole or not at all (`writing`), and held by one process (`locks`)."""
