//! What armlet says, in a file of its own and in Firecracker's form.

use armlet_api::model::{Level, Logger};
use armlet_system::files;
use armlet_system::messages::{self, Form};
use std::io;

/// Where messages go, and how their lines look.
pub(super) struct LogFile;

impl LogFile {
    /// Has messages go where `logger` says, for the microVM of this ID. What it does not say stays.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub(super) fn configure(id: &str, logger: &Logger) -> io::Result<()> {
        let file = logger.log_path.as_deref().map(files::append).transpose()?;
        if let Some(level) = logger.level {
            log::set_max_level(match level {
                Level::Off => log::LevelFilter::Off,
                Level::Error => log::LevelFilter::Error,
                Level::Warn => log::LevelFilter::Warn,
                Level::Info | Level::Debug | Level::Trace => log::LevelFilter::Info,
            });
        }
        messages::change_form(
            file,
            Form {
                id: id.to_owned(),
                show_level: logger.show_level,
            },
        );
        Ok(())
    }
}
