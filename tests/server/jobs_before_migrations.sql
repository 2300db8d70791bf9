CREATE TABLE videos (
	number INTEGER NOT NULL,
	account VARCHAR(64) NOT NULL,
	model VARCHAR(256) NOT NULL,
	request JSON NOT NULL,
	seconds VARCHAR(32) NOT NULL,
	size VARCHAR(32) NOT NULL,
	created_at DOUBLE NOT NULL,
	remixed_from VARCHAR(64),
	id VARCHAR(64) NOT NULL,
	status VARCHAR(16) NOT NULL,
	progress INTEGER NOT NULL,
	completed_at DOUBLE,
	expires_at DOUBLE,
	error_code VARCHAR(64),
	error_message VARCHAR,
	worker VARCHAR(64),
	lease_until DOUBLE NOT NULL,
	attempts INTEGER NOT NULL,
	bytes BIGINT NOT NULL,
	report JSON,
	PRIMARY KEY (number),
	UNIQUE (id)
);
CREATE INDEX ix_videos_status ON videos (status);
CREATE INDEX ix_videos_account ON videos (account);
INSERT INTO "videos" VALUES(1,'','m','{"prompt": "a red rocket", "schedule": "3+3", "seed": 0, "fps": 16}','1','32x32',1795900000.0,NULL,'video_00000000000000000000000000000000','completed',100,1795900020.0,4102444800.0,NULL,NULL,'w',1795900040.0,1,18,'{"schedule": "3+3"}');
INSERT INTO "videos" VALUES(2,'','m','{"prompt": "a blue car", "schedule": "3+3", "seed": 1, "fps": 16}','1','32x32',1795900001.0,NULL,'video_00000000000000000000000000000001','in_progress',40,NULL,NULL,NULL,NULL,'w',1795900040.0,1,0,NULL);
INSERT INTO "videos" VALUES(3,'','m','{"prompt": "an owl''s nest", "schedule": "3+3", "seed": 2, "fps": 16}','1','32x32',1795900002.0,NULL,'video_00000000000000000000000000000002','queued',0,NULL,NULL,NULL,NULL,NULL,0.0,0,0,NULL);
