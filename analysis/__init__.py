"""One claim of theory per script, held against measurements; docs/theory.md tells the story."""
