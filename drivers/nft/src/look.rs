//! Looking without changing.

use keepwall_ir::nft::Table;

use crate::nft::{differences, normalised};
use crate::{Nft, NftError, Outcome};

impl Nft {
    /// What differs between the kernel and `desired`, a phrase each; empty if nothing does.
    ///
    /// # Errors
    /// As for [`Nft::observe`].
    pub fn differences(&mut self, desired: &Table) -> Result<Vec<String>, NftError> {
        let desired = normalised(desired);
        let found = self.observe_all_of(desired.family, &desired.name)?;
        if found.as_ref().is_some_and(|found| found.table == *desired && found.not_understood.is_empty()) {
            return Ok(Vec::new());
        }
        Ok(differences(found.as_ref(), &desired))
    }

    /// Takes the table over if it is just this one; `false`, and nothing changed, if it is not.
    ///
    /// # Errors
    /// As for [`Nft::replace`].
    pub fn adopt_if_equal(&mut self, desired: &Table) -> Result<bool, NftError> {
        if !self.differences(desired)?.is_empty() {
            return Ok(false);
        }
        Ok(matches!(self.converge(desired)?, Outcome::AlreadyThere))
    }
}
