"""What kernels are made of: the loops (`walks`), where a weight lies (`hashing`, `pieces`, `spans`), what is
stored there (`half`, `codes`, `groups`, `cache`), how a machine is used (`lanes`, `vector`, `launch`,
`simulator`), what work costs (`cost`), and where compiled kernels are kept (`disk_cache`)."""
