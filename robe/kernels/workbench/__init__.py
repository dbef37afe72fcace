"""Tools for whoever works on a kernel: a table of awkward cases (`cases`), a look inside (`inspection`)."""
