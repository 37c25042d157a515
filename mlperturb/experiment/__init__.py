"""The paper's experiment: cases, evaluation, compression as a defence."""
