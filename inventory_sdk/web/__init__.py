"""The SDK on the web: ASGI middleware and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory
    from inventory_sdk.web.admin.app import AdminApp
    from inventory_sdk.web.admin.auth import Auth


def admin_app(inventory: Inventory, *, auth: Auth) -> AdminApp:
    """The management pages as an ASGI app: ``app.mount("/admin", admin_app(inventory, auth=PasswordAuth.from_file(…)))``.

    ``auth`` says who asks (``inventory_sdk.web.admin``); without one there are no pages. Mounted in another app, that app starts the
    inventory; served alone, the pages do. ``ImportError`` names the extra that is missing, ``InvalidOperation`` what is wrong with
    ``auth``.
    """
    try:
        from inventory_sdk.web.admin.app import AdminApp
    except ImportError as error:
        raise ImportError(f"the management pages need more ({error}): pip install 'inventory_sdk[admin]'") from error
    return AdminApp(inventory, auth)
