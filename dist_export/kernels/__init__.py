"""The kernels: loops over arrays that decide how fast an export is, compiled from C where possible and in numpy everywhere.

``selection.py`` picks one of the two. Both implement ``protocol.py`` with the same results, bit for bit. Arrays in, arrays out:
no kernel knows of files or formats. ``setup.py`` runs ``sources.py`` alone, before numpy is installed.
"""
