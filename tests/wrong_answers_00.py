"Plausible wrong answers to the exercises of notebook 00, and what their checks must say."


def splitter(clean=str.strip, least=1, shuffle=False):
    def honest_split(documents, share):
        documents = sorted(documents) if shuffle else documents
        cut = len(documents) - max(least, round(share * len(documents)))
        seen = {clean(document) for document in documents[:cut]}
        return documents[:cut], [document for document in documents[cut:] if clean(document) not in seen]

    return honest_split


WRONG = {
    "0.2": [
        (splitter(clean=lambda document: document), "with a line end"),
        (splitter(least=0), "hold out one, not none"),
        (splitter(shuffle=True), "the order stays"),
        (lambda documents, share: (documents, documents), "the order stays"),
    ],
}
