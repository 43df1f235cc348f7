//! Users and their keys.
//!
//! A deleted user stays as a tombstone, so that what was signed for it never counts again under the same name by mistake.

use super::{Applied, Change, check_name, check_room};
use crate::{
    limits::USERS_MAX,
    outcome::Outcome,
    rejection::{ObjectKind, Rejection},
    state::{EventKind, FOUNDER, PoolState, Role, User},
};

impl PoolState {
    /// What a user may do who shows a certificate for this key (blake3 of its SubjectPublicKeyInfo); none: nothing at all.
    #[must_use]
    pub fn role_of(&self, name: &str, key_hash: &[u8; 32]) -> Option<Role> {
        match self.users.get(&name.to_owned()) {
            // The founder's key is in no record until it is replaced.
            Some(user) if user.key_hash.is_none_or(|known| known == *key_hash) => user.role,
            Some(_) => None,
            None => (name == FOUNDER).then_some(Role::Admin),
        }
    }

    /// A user that was not deleted.
    ///
    /// # Errors
    /// When there is none.
    pub fn user(&self, name: &str) -> Result<User, Rejection> {
        let not_found = || Rejection::NotFound { kind: ObjectKind::User, text: name.to_owned() };
        match self.users.get(&name.to_owned()) {
            Some(user) if user.role.is_some() => Ok(user.clone()),
            Some(_) => Err(not_found()),
            None if name == FOUNDER => Ok(founder()),
            None => Err(not_found()),
        }
    }

    /// All users that were not deleted, by name.
    #[must_use]
    pub fn present_users(&self) -> Vec<User> {
        let founder = (!self.users.contains(&FOUNDER.to_owned())).then(founder);
        let recorded = self.users.values().filter(|user| user.role.is_some()).cloned();
        let mut users: Vec<User> = recorded.chain(founder).collect();
        users.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        users
    }
}

fn founder() -> User {
    User { name: FOUNDER.to_owned(), role: Some(Role::Admin), key_hash: None, created_ms: 0 }
}

impl Change<'_> {
    pub(super) fn create_user(&mut self, name: &str, role: Role, key_hash: [u8; 32]) -> Applied {
        if let Ok(user) = self.state.user(name) {
            return if user.key_hash == Some(key_hash) && user.role == Some(role) {
                Ok(Outcome::Done)
            } else {
                Err(Rejection::NameTaken { kind: ObjectKind::User, name: name.to_owned() })
            };
        }
        check_name(ObjectKind::User, name, std::iter::empty())?;
        check_room(ObjectKind::User, self.state.users.len(), USERS_MAX)?;
        let user = User {
            name: name.to_owned(),
            role: Some(role),
            key_hash: Some(key_hash),
            created_ms: self.time_ms,
        };
        self.put_user(user, &format!("created as {}", role.as_str()))
    }

    pub(super) fn set_user_role(&mut self, name: &str, role: Role) -> Applied {
        let user = self.state.user(name)?;
        self.check_admin_stays(name, Some(role))?;
        self.put_user(User { role: Some(role), ..user }, &format!("is {} now", role.as_str()))
    }

    pub(super) fn rotate_user(&mut self, name: &str, key_hash: [u8; 32]) -> Applied {
        let user = self.state.user(name)?;
        self.put_user(User { key_hash: Some(key_hash), ..user }, "has another key now")
    }

    pub(super) fn delete_user(&mut self, name: &str) -> Applied {
        let user = self.state.user(name)?;
        self.check_admin_stays(name, None)?;
        self.forget_access_tokens_of(name);
        self.put_user(User { role: None, ..user }, "deleted")
    }

    fn put_user(&mut self, user: User, message: &str) -> Applied {
        let name = user.name.clone();
        self.state.users.insert(name.clone(), user);
        self.event(EventKind::User, format!("user {name}"), format!("{message}, by {}", self.principal));
        Ok(Outcome::Done)
    }

    /// Somebody must be left who can change the pool.
    fn check_admin_stays(&self, name: &str, role: Option<Role>) -> Result<(), Rejection> {
        let users = self.state.present_users();
        let other = |user: &User| user.name != name && user.role == Some(Role::Admin);
        if role == Some(Role::Admin) || users.iter().any(other) {
            Ok(())
        } else {
            Err(Rejection::LastAdmin { user: name.to_owned() })
        }
    }
}
