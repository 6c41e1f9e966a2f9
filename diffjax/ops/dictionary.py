"""The dictionary of the token models: special entries first, then the codes (the layout of fairseq's dictionaries).

Between rooms a code is 0 .. K-1; code c is entry SPECIALS + c, and logits over a dictionary have SPECIALS + K columns.
"""

SPECIALS = 5  # <s>, <pad>, </s>, <unk>, <n>
PAD = 1
END = 2  # </s>, also what every sequence starts with
MASK = 3  # <unk>

NO_CODE = -1  # in the place of a code: hidden from the model, or past the end
