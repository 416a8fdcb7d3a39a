"""From a file to pixels: decoders, the processes they run in, caches, deep greys."""
