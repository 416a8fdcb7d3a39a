"""Where images come from, and what is said of them: folders, lists, arrays, shards, streams."""
