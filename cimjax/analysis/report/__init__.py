"""Reports of trained runs, as one page that needs nothing else: `page.report` makes it.

`gather` reads the runs, `sections` says what is told of them, `drawing` draws, and `page` writes HTML or Markdown.
"""
