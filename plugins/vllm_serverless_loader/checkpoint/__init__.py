"""The checkpoint format: index, writer, reader."""
