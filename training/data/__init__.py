"""The text: a corpus and its batches."""
