"""Reports from records. Knows records and facts, not how they were measured.

records ─▶ subject (what can be compared) ─▶ sections ─▶ Document ─┬▶ html
facts  ───────────────────────────────────────▲                    ├▶ pdf
└▶ markdown
"""
