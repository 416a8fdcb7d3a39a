"""From a run to a bundle: the graph, its preprocessing, its precision, and the proof that it gives
the same answers.
"""
