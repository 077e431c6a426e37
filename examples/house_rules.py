"""Rules of an owner, for `slip trusted DIR/trusted --rules examples.house_rules:HouseRules` (from the repository)."""

import re

import msgspec

from sliplm.serve.rules import Refused


class HouseRules:
    def request(self, request, device):
        """The request to run instead, or the same; Refused, with a sentence for the customer."""
        # All that the customer wrote, wherever: descriptions of tools, arguments of calls and schemas, too.
        if len(msgspec.json.encode(request)) > 20_000:
            raise Refused("this service takes up to 20,000 bytes of JSON")
        return request

    def response(self, request, device, text, finished):
        """How much of the answer may be shown by now; `text` is all of it so far, as the model wrote it."""
        # The last digits may be part of a number. They stay hidden when the answer ends, for customers choose where.
        end = re.search(r"[\d-]*$", text).start()
        return re.sub(r"\d{3}-\d{4}", "[number]", text[:end])
