//! `Queue`: where messages are kept and how many.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, Dur};

/// Where messages are kept and how many.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QueueSpec {
    /// Default: embedded.
    pub backend: Option<QueueBackend>,
    /// Messages. Default 1000000.
    #[schemars(range(min = 1))]
    pub max_depth: Option<u64>,
    /// Bytes of messages. Default 1GiB.
    pub max_bytes: Option<ByteSize>,
    /// What one caller may hold of that. Default: all of it.
    pub per_caller: Option<PerCallerSpec>,
    /// Where everything that happens to a message is told. Default: nowhere.
    pub events: Option<EventsSpec>,
    /// What is kept of messages that failed.
    pub dead_letters: Option<DeadLettersSpec>,
}

/// What one caller may hold of a queue.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PerCallerSpec {
    /// Messages. Default: as many as the queue may hold.
    #[schemars(range(min = 1))]
    pub max_depth: Option<u64>,
    /// Bytes of messages. Default: as many as the queue may hold.
    pub max_bytes: Option<ByteSize>,
}

/// Where everything that happens to a message is told, as CloudEvents 1.0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EventsSpec {
    /// `http://` or `https://`, a host, and a path where it is not `/`. Each event is a POST.
    pub url: String,
    /// A file at the sidecar with the authorities to trust. Default: the system's.
    pub ca_file: Option<String>,
    /// Events in one POST, as a CloudEvents batch where it is more than 1. Default 1.
    #[schemars(range(min = 1, max = 1000))]
    pub batch: Option<u16>,
    /// Events that wait for a receiver that is away; beyond it the oldest are dropped and counted.
    /// Default 1000000.
    #[schemars(range(min = 1))]
    pub max_backlog: Option<u64>,
}

/// What keeps the messages: exactly one member.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-exactly-one" = true))]
pub struct QueueBackend {
    /// The sidecar's own store.
    pub embedded: Option<EmbeddedBackend>,
    /// Kafka.
    pub kafka: Option<KafkaBackend>,
    /// RabbitMQ quorum queues.
    pub rabbitmq: Option<RabbitmqBackend>,
    /// NATS JetStream.
    pub nats: Option<NatsBackend>,
    /// AMQP 1.0.
    pub amqp1: Option<Amqp1Backend>,
    /// MQTT 5.
    pub mqtt: Option<MqttBackend>,
    /// Redis Streams.
    pub redis: Option<RedisBackend>,
}

/// The set member of a [`QueueBackend`].
#[derive(Debug, Clone, Copy)]
pub enum QueueBackendKind<'a> {
    /// The sidecar's own store.
    Embedded(&'a EmbeddedBackend),
    /// Kafka.
    Kafka(&'a KafkaBackend),
    /// RabbitMQ.
    Rabbitmq(&'a RabbitmqBackend),
    /// NATS JetStream.
    Nats(&'a NatsBackend),
    /// AMQP 1.0.
    Amqp1(&'a Amqp1Backend),
    /// MQTT 5.
    Mqtt(&'a MqttBackend),
    /// Redis Streams.
    Redis(&'a RedisBackend),
}

impl QueueBackend {
    /// The set member; none only where the document was not validated.
    pub fn as_enum(&self) -> Option<QueueBackendKind<'_>> {
        None.or_else(|| self.embedded.as_ref().map(QueueBackendKind::Embedded))
            .or_else(|| self.kafka.as_ref().map(QueueBackendKind::Kafka))
            .or_else(|| self.rabbitmq.as_ref().map(QueueBackendKind::Rabbitmq))
            .or_else(|| self.nats.as_ref().map(QueueBackendKind::Nats))
            .or_else(|| self.amqp1.as_ref().map(QueueBackendKind::Amqp1))
            .or_else(|| self.mqtt.as_ref().map(QueueBackendKind::Mqtt))
            .or_else(|| self.redis.as_ref().map(QueueBackendKind::Redis))
    }
}

/// The sidecar's own store, in its state directory.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EmbeddedBackend {
    /// Also on a volume that does not survive the container (tmpfs, overlay). Default false.
    pub allow_ephemeral: Option<bool>,
}

/// Kafka.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KafkaBackend {
    /// `host:port`, at least one.
    #[schemars(length(min = 1))]
    pub brokers: Vec<String>,
    /// Default: the queue's name.
    pub topic: Option<String>,
    /// Copies; a message counts as stored when all in sync have it. Default 3.
    #[schemars(range(min = 1))]
    pub replicas: Option<u16>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// RabbitMQ quorum queues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RabbitmqBackend {
    /// `amqp://host:port/vhost`.
    pub url: String,
    /// Default: the queue's name.
    pub queue: Option<String>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// NATS JetStream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NatsBackend {
    /// `nats://host:port`.
    pub url: String,
    /// Default: the queue's name.
    pub stream: Option<String>,
    /// Default 1.
    #[schemars(range(min = 1, max = 5))]
    pub replicas: Option<u16>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// AMQP 1.0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Amqp1Backend {
    /// `amqp://host:port`.
    pub url: String,
    /// Default: the queue's name.
    pub address: Option<String>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// MQTT 5.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MqttBackend {
    /// `mqtt://host:port`.
    pub url: String,
    /// Default: the queue's name.
    pub topic: Option<String>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// Redis Streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedisBackend {
    /// `redis://host:port`.
    pub url: String,
    /// Default: the queue's name.
    pub stream: Option<String>,
    /// User name and password.
    pub credentials: Option<BrokerCredentials>,
    /// TLS to the broker.
    pub tls: Option<BrokerTls>,
}

/// A user name, and a file at the sidecar with the password.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BrokerCredentials {
    /// The user name.
    pub username: String,
    /// A file at the sidecar.
    pub password_file: String,
}

/// TLS to a broker.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BrokerTls {
    /// A file at the sidecar with the authorities to trust. Default: the system's.
    pub ca_file: Option<String>,
    /// A file at the sidecar with our certificate.
    pub certificate_file: Option<String>,
    /// A file at the sidecar with its key.
    pub key_file: Option<String>,
    /// The name to expect. Default: the host.
    pub server_name: Option<String>,
}

/// What is kept of messages that failed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeadLettersSpec {
    /// Default 336h.
    pub retain: Option<Dur>,
}

impl QueueSpec {
    /// The settings of the sidecar's own store, when messages are kept there.
    pub fn embedded(&self) -> Option<EmbeddedBackend> {
        match &self.backend {
            None => Some(EmbeddedBackend::default()),
            Some(backend) => backend.embedded.clone(),
        }
    }
}
