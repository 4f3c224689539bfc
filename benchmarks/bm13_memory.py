"""BM13: memory of a whole training run over 50 epochs, workers included; kB that an epoch adds, ours only (the
baseline is the run itself after its warm-up).

The project's engine trains: its loaders with two worker processes (and once with two threads), augmentation, EMA,
validation, history, metrics.json, last.pt and best.pt after each epoch. The photos are tiny, since
a leak counts epochs and batches, not pixels. After each epoch the memory of this process and of all its children is
added up, shared pages once: Linux' PSS, without the pages of files (libraries, photos), whose share changes whenever
a stranger on the machine opens the same ones.
The first ten epochs are left out, in which pools fill and the allocator finds its size; the rest gives the slope: of
each five epochs the smallest (what is under way at the moment comes and goes, 9 MB at a time), and of these the
median of the slopes of all pairs (Theil-Sen).
What may grow is the history, a few kB an epoch. `--leak 500` keeps so many kB an epoch on purpose: the run must then
be missed.
"""

if __name__ == "__main__":  # worker processes read this file again, and need none of what the training imports
    from long_training import main

    main(__doc__)
