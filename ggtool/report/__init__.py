"""Records turned into what a person reads. Knows records and facts and nothing of how they were measured.

records ─▶ subject (what can be compared) ─▶ sections ─▶ Document ─┬▶ html
facts  ───────────────────────────────────────▲                    ├▶ pdf
└▶ markdown
"""
