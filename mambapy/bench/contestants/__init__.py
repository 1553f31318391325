"""Who is measured: a file for each library, and one for the floor that no library can beat.

A file has those of `scan`, `block`, `experts`, `vision`, `language_model` and `decoder` that its
library offers; see `mambapy.bench.work` for what they must return. worker.py loads each by path, in
a process whose `mambapy` is the library that the file is for: none of them may import
`mambapy.bench`.
"""
