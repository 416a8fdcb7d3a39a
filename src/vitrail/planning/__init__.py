"""What a run would take, tried out and on paper, before it is started."""
