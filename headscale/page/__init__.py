"""The report: one page from saved results. Sentences, tables, figures and advice are gathered, then written."""
