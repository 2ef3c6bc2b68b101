"""The harness: what measures flaxqa on SQuAD. It imports flaxqa, never the reverse."""
