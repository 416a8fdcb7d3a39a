"""What the report says of a task: one file of sections each."""
