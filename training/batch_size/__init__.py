"""How large a batch is worth its tokens: branches of a run at several batch sizes, and their fit."""
