"""Tables, findings in words, figures and the HTML page: pure functions from scores and samples to text and bytes.

`tables.make_table`, `findings.findings`, `figures.figure_*` and `page.report_page` return what is to be written; the
command line writes it. The same inputs give the same bytes.
"""
