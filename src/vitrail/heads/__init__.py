"""From a backbone's features to what a task asks for; one head, one file."""
