if __name__ != "colocc.passes":
    raise ImportError(f"import colocc.passes, not {__name__}")
