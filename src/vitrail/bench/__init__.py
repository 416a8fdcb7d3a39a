"""What a model costs and what it is worth, measured here: counts, speed, memory, comparisons.

macs     multiply-accumulates, counted
measure  images a second and latency, models taking turns; parameters
memory   the most memory that labelling a batch takes, in a process of its own
hog      the traditional baseline: HOG features and a linear classifier
compare  models trained alike on the same images, and all of the above side by side
patches  what patch and image size really cost, beside the article's claims
"""
