"""Files on the disk: how they are read (`reading`), written whole or not at all (`writing`), and locked (`locks`)."""
