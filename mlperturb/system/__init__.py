"""What a program needs of a machine: files, a journal, processes, threads, signals, devices."""
