"""From pictures to batches: order, making, loading."""
