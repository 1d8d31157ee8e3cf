"""The management pages: ``inventory_sdk.web.admin_app(inventory, auth=…)``. Here is who may see them."""

from inventory_sdk.web.admin.auth import Auth, Role, SignsIn, TooManyTries, User
from inventory_sdk.web.admin.passwords import Account, PasswordAuth, hash_password

__all__ = ["Account", "Auth", "PasswordAuth", "Role", "SignsIn", "TooManyTries", "User", "hash_password"]
