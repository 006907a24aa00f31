"""The audit of a layer of one's own: `audit` runs it, `checks` lists it for pytest.

    from liplayers.testing import audit
    print(audit(MyLinear, "linear", orthogonal=True))

It is what every family of liplayers is tested with. `liplayers.audit` is about another thing: it attacks certificates.
"""

from liplayers.testing.suite import Audit, Check, Finding, audit, checks

__all__ = ["Audit", "Check", "Finding", "audit", "checks"]
