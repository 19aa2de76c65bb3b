"""Files on the disk: read (`reading`), written whole or not at all (`writing`) or to be mapped (`aligned`), locked (`locks`)."""
