if __name__ != "colocc.runtime":
    raise ImportError(f"import colocc.runtime, not {__name__}")
