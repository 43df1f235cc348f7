//! Images.

use super::{Applied, Change, check_name, check_room, find_mut};
use crate::{
    limits::IMAGES_MAX,
    outcome::Outcome,
    rejection::{ObjectKind, Rejection},
    state::{ContentHash, EventKind, Image},
};
use proto::{ByteCount, HostId, ImageId};

impl Change<'_> {
    pub(super) fn create_image(
        &mut self,
        name: &str,
        blake3: ContentHash,
        size: ByteCount,
        holders: &[HostId],
    ) -> Applied {
        check_name(ObjectKind::Image, name, self.state.images.values().map(|image| image.name.as_str()))?;
        check_room(ObjectKind::Image, self.state.images.len(), IMAGES_MAX)?;
        let mut distinct = holders.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.is_empty() {
            return Err(Rejection::ImageWithoutHolder { image: name.to_owned() });
        }
        for holder in &distinct {
            self.check_member(*holder)?;
        }
        let id = ImageId(self.index);
        self.state.images.insert(id, Image { id, name: name.to_owned(), blake3, size, holders: distinct });
        self.event(EventKind::Image, format!("image {name}"), format!("imported, {size}"));
        Ok(Outcome::Image(id))
    }

    pub(super) fn add_image_holder(&mut self, id: ImageId, host: HostId) -> Applied {
        self.check_member(host)?;
        let image = find_mut(&mut self.state.images, &id, ObjectKind::Image)?;
        if !image.holders.contains(&host) {
            image.holders.push(host);
            image.holders.sort_unstable();
            let object = format!("image {}", image.name);
            let message = format!("also held by host {}", self.state.host_name(host));
            self.event(EventKind::Image, object, message);
        }
        Ok(Outcome::Image(id))
    }

    pub(super) fn delete_image(&mut self, id: ImageId) -> Applied {
        let name = self.state.image(id)?.name.clone();
        let uses = |image: Option<ImageId>| image == Some(id);
        if let Some(vm) = self.state.vms.values().find(|vm| uses(vm.spec.kernel) || uses(vm.spec.initrd)) {
            return Err(Rejection::ImageInUse { image: name, vm: vm.name.clone() });
        }
        self.state.images.remove(&id);
        self.event(EventKind::Image, format!("image {name}"), "deleted".into());
        Ok(Outcome::Image(id))
    }

    pub(super) fn check_member(&self, host: HostId) -> Result<(), Rejection> {
        let host = self.state.host(host)?;
        if host.is_member() { Ok(()) } else { Err(Rejection::HostRemoved { host: host.name.clone() }) }
    }
}
