"""What kernels are made of: where a weight lies (`hashing`, `pieces`, `spans`), what is stored there (`half`,
`codes`, `groups`, `cache`), how a machine is used (`lanes`, `vector`, `launch`), what work costs (`cost`)."""
