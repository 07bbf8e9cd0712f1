"""The run folder: where files lie, what is written there and read again."""
