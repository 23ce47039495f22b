"""One HTML page about a package.

The facts are pure (``facts``, ``timeline``, ``norms``), reading is apart from them (``read``), and so is the page (``page`` with
``page.html``, ``page.css`` and ``page.js``).
"""
