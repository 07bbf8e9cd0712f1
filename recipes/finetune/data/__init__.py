"""Images, tasks and splits, whatever their source, and images prepared once."""
