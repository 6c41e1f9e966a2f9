"""Public data sets from their original files: the table DATASETS in datasets.py, one module per kind of original.

A kind reads where a user placed the files into `Originals` (originals.py); write.py makes the records of them.
"""
