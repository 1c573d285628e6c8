"""Where the answers of `draftsmith regenerate` come from: this process, several, or a server. Each of them is a
generator of answers in the order in which they end.
"""
